"""The native module (bindings.cpp): addresses as integers, see flashmoe_cpu.h."""

def isa_names() -> str: ...
def packed_matrix_bytes(format: int, rows: int, columns: int) -> int: ...
def packed_expert_bytes(format: int, hidden: int, width: int) -> int: ...
def unpack_matrix(packed: Matrix, out: int) -> None: ...
def unpack_expert(
    format: int, hidden: int, width: int, packed: int, gate: int, up: int, down: int
) -> None: ...
def gather_rows(matrix: Matrix, ids: int, n: int, out: int) -> None: ...

class Matrix:
    def __init__(self, data: int, format: int, rows: int, columns: int) -> None: ...

class Experts:
    def __init__(
        self, hidden: int, width: int, format: int, activation: int, exact: bool, limit: float = 7.0,
        alpha: float = 1.702,
    ) -> None: ...  # fmt: skip

class Attention:
    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, qk_norm: int, window: int, exact: bool,
        eps: float, clip: float, input_norm: int, qkv: Matrix, qkv_bias: int, q_norm: int, k_norm: int,
        o: Matrix, o_bias: int, keys: int, values: int,
    ) -> None: ...  # fmt: skip

class Router:
    def __init__(
        self, hidden: int, experts: int, top_k: int, renormalise: bool, eps: float, norm: int, weight: int
    ) -> None: ...

class Context:
    def __init__(self, threads: int, isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def busy_s(self) -> float: ...
    @property
    def workspace_bytes(self) -> int: ...
    def linear(
        self, matrix: Matrix, bias: int, x: int, tokens: int, exact: bool, y: int, y_step: int
    ) -> None: ...
    def mlp(
        self, activation: int, gate: Matrix, up: Matrix, down: Matrix, x: int, tokens: int, exact: bool,
        factor: int, y: int,
    ) -> None: ...  # fmt: skip
    def moe_begin(self, experts: Experts, x: int, tokens: int, top_k: int) -> None: ...
    def moe_experts(self, table: int, n: int, row_begin: int, rows: int, products: int) -> None: ...
    def moe_end(self, products: int, weights: int, y: int) -> None: ...
    def moe(
        self, experts: Experts, x: int, tokens: int, top_k: int, table: int, n: int, row_begin: int,
        rows: int, products: int, weights: int, y: int,
    ) -> None: ...  # fmt: skip
    def attend(
        self, attention: Attention, cos: int, sin: int, sequences: int, n: int, x: int
    ) -> None: ...
    def route(
        self, router: Router, x: int, tokens: int, h: int, probabilities: int, ids: int, weights: int
    ) -> None: ...
    def attend_and_route(
        self, attention: Attention, router: Router, cos: int, sin: int, sequences: int, n: int, tokens: int,
        x: int, h: int, probabilities: int, ids: int, weights: int,
    ) -> None: ...  # fmt: skip
    def rms_norm(self, x: int, weight: int, tokens: int, hidden: int, eps: float, h: int) -> None: ...
    def pack_matrix(
        self, source: Matrix, format: int, importance: int, out: int
    ) -> tuple[float, float]: ...
    def pack_expert(
        self, gate: Matrix, up: Matrix, down: Matrix, format: int, importance_in: int, importance_hidden: int,
        out: int,
    ) -> tuple[float, float]: ...  # fmt: skip
    def lay_out_matrix(
        self, format: int, rows: int, columns: int, codes: int, scales: int, out: int
    ) -> None: ...
    def lay_out_expert(
        self, format: int, hidden: int, width: int, gate: int, up: int, down: int, gate_scales: int,
        up_scales: int, down_scales: int, out: int,
    ) -> None: ...  # fmt: skip
