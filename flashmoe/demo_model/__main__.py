"""`python -m flashmoe.demo_model [FOLDER]`: build smolmoe, reporting in JSON lines on stdout.

{"progress": [what, done, total]} as it goes on, then {"folder": path} and exit 0, or {"error": text} and exit
1.
"""

import json
import sys
from pathlib import Path

from flashmoe.demo_model import build_demo_model
from flashmoe.errors import DemoModelError


def main(arguments: list[str]) -> int:
    try:
        folder = build_demo_model(Path(arguments[0]) if arguments else None, _report)
    except DemoModelError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"folder": str(folder)}))
    return 0


def _report(what: str, done: int, total: int) -> None:
    print(json.dumps({"progress": [what, done, total]}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
