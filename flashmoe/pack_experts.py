"""How `flashmoe pack` quantises one expert: plainly, weighted by activations, or with GPTQ."""

import logging
from typing import Protocol

import torch
from torch import Tensor

from flashmoe import gptq
from flashmoe.calibration import Calibration, Hessians
from flashmoe.weights import ExpertId
from kernels import native
from kernels.native import Context, Format
from storage.pack_journal import Sums

log = logging.getLogger(__name__)


class ExpertPacker(Protocol):
    """gate, up [F, D] and down [D, F] into out [expert_bytes] uint8; experts come in ascending order.

    Returns (sum of weighted squared errors, sum of weighted squares); not finite where the weights were not.
    """

    def pack(self, expert: ExpertId, gate: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Sums: ...


class RoundedExperts:
    """Each weight by itself, its error weighted by `calibration` if there is one."""

    def __init__(self, context: Context, format: Format, calibration: Calibration | None) -> None:
        self._context, self._format, self._calibration = context, format, calibration

    def pack(self, expert: ExpertId, gate: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Sums:
        importance = (None, None) if self._calibration is None else self._calibration.importance(expert)
        return native.pack_expert(self._context, gate, up, down, self._format, out, importance)


class GptqExperts:
    """int4 with GPTQ; plain rounding for an expert whose activations were not numbers."""

    def __init__(self, context: Context, hessians: Hessians) -> None:
        self._context, self._hessians = context, hessians
        self._layer, self._inputs = -1, None  # type: tuple[int, list[gptq.Factors] | None]
        self._has_warned = False

    def pack(self, expert: ExpertId, gate: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Sums:
        inputs, hidden = self._factors(expert)
        if inputs is None or hidden is None:
            self._warn_once(expert)
            return native.pack_expert(self._context, gate, up, down, Format.INT4, out)
        gate_up = gptq.quantise(self._context, torch.cat([gate, up]), inputs)
        of_down = gptq.quantise(self._context, down, hidden)
        codes = (*gate_up.codes.chunk(2), of_down.codes)
        scales = (*gate_up.scales.chunk(2), of_down.scales)
        native.lay_out_expert(self._context, codes, scales, Format.INT4, out)
        return gate_up.sums[0] + of_down.sums[0], gate_up.sums[1] + of_down.sums[1]

    def _factors(self, expert: ExpertId) -> tuple[list[gptq.Factors] | None, list[gptq.Factors] | None]:
        """Those of gate's and up's inputs are one for the layer."""
        inputs, hidden = self._hessians.of(expert)
        if expert[0] != self._layer:
            self._layer, self._inputs = expert[0], gptq.factorise(inputs.mean())
        return self._inputs, gptq.factorise(hidden)

    def _warn_once(self, expert: ExpertId) -> None:
        if not self._has_warned:
            log.warning(
                "expert %d of layer %d is rounded plainly: its activations on the calibration text are no"
                " finite numbers (said once)",
                expert[1],
                expert[0],
            )
        self._has_warned = True
