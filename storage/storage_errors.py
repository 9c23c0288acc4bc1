"""Everything that can go wrong between a path and its bytes.

    StorageError           a file cannot be opened or written (not permitted, disk full)
    ├── CheckpointError    a file is missing, truncated or not what its header says; found at opening
    └── ReadError          the drive failed, or the file shrank, while weights were being read

Messages name the file, the tensor or offset, the numbers, and the next step.
"""


class StorageError(Exception):
    """Base of all errors that `storage` raises because of a file, a drive or the system."""


class CheckpointError(StorageError):
    """The checkpoint's files are missing or malformed."""


class ReadError(StorageError):
    """A read failed or came back short."""
