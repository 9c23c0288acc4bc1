"""What can go wrong on the user's side of the runtime.

    FlashMoEError
    ├── ConfigError      an option or a config.json that cannot be used
    ├── ModelError       a checkpoint or its numbers that cannot be used
    ├── BudgetError      a RAM or VRAM budget that cannot work
    ├── GpuError         a GPU, its driver, or memory that cannot be pinned for it
    ├── TokenizerError   tokenizer.json or the chat template
    ├── ContextError     more tokens than the context holds
    ├── QueueFullError   more requests than may wait
    ├── TraceError       a routing trace that cannot be used
    ├── PolicyError      a learned policy's file that cannot be used, or traces too short to train one
    └── DemoModelError   the demo model cannot be built

`storage.storage_errors.StorageError` is the tree of the package below; `cli.py` catches both.
"""


class FlashMoEError(Exception):
    """Anything a user, a file or a drive caused; its text is one line that says what to do next."""


class ConfigError(FlashMoEError):
    """An option, or a value in config.json, that cannot be used."""


class ModelError(FlashMoEError):
    """A checkpoint that is not the model its config describes, or logits that are not numbers."""


class BudgetError(FlashMoEError):
    """A RAM budget that cannot be read, or cannot hold the model's smallest working set."""


class GpuError(FlashMoEError):
    """A call of the GPU's driver that failed, or memory that it cannot pin."""


class TokenizerError(FlashMoEError):
    """A tokenizer file or chat template that is missing or cannot be used."""


class ContextError(FlashMoEError):
    """A prompt longer than the context."""


class QueueFullError(FlashMoEError):
    """More requests than may wait; `retry_after_s` is when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DemoModelError(FlashMoEError):
    """The demo model cannot be built: missing base weights, a full disk, a file that was changed."""


class TraceError(FlashMoEError):
    """A routing trace that is not one, or not the one that was asked for."""


class PolicyError(FlashMoEError):
    """A policy file that is none, is damaged or was made for something else; traces too short to train on."""
