"""When a batch does not fit into memory, of a GPU or of the machine."""

import torch

_MESSAGES = (
    "not enough memory",
    "DefaultCPUAllocator",
    "can't allocate memory",
    "bad_alloc",
    "out of memory",  # "CUDA error: out of memory", "MPS backend out of memory"
    "STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
    # What oneDNN says when its scratch memory cannot be had. It may mean something else; then a single image fails as
    # well, and these words are in the error that people get.
    "could not create a primitive",
    "could not execute a primitive",
    "could not create a memory object",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated. Often torch has only words for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
