"""Cut a small trace out of a large one, for tests: some sequences of one data set, ids and tokens alone.

    python -m scripts.slice_trace gpt-oss-20b.npz --dataset mmlu_dev --tokens 1400 --output slice.npz
"""

import argparse
from pathlib import Path

import numpy as np

from flashmoe.npz import write_npz
from flashmoe.trace import load_trace


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--tokens", type=int, required=True, help="at most so many, in whole sequences")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    trace = load_trace(arguments.trace, with_scores=False).of_datasets([arguments.dataset])
    fitting = int(np.searchsorted(trace.seq_offsets, arguments.tokens, side="right")) - 1
    cut = trace.select(range(fitting))
    assert cut.tokens is not None
    write_npz(
        arguments.output,
        {
            "experts": cut.experts,
            "seq_offsets": cut.seq_offsets,
            "token": cut.tokens,
            "dataset": np.array(cut.datasets),
            "num_experts": np.array(cut.num_experts, dtype=np.int64),
        },
    )
    print(f"{arguments.output}: {len(cut)} tokens, {arguments.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
