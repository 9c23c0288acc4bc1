"""`python -m flashmoe.demo_model [FOLDER]`: build smolmoe, reporting in JSON lines on stdout.

{"progress": [what, done, total]} as it goes on, then {"folder": path} and exit 0, or {"error": text} and exit
1.
"""

import json
import sys
from pathlib import Path
from typing import Any

from flashmoe.demo_model import build_demo_model
from flashmoe.errors import DemoModelError


def main(arguments: list[str]) -> int:
    def progress(what: str, done: int, total: int) -> None:
        _report(progress=[what, done, total])

    try:
        folder = build_demo_model(Path(arguments[0]) if arguments else None, progress)
    except DemoModelError as error:
        _report(error=str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    _report(folder=str(folder))
    return 0


def _report(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
