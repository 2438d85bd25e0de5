"""The errors that the learning core raises; each message says what was expected, what came and how to mend it."""


class TSPError(Exception):
    """Root of every error raised on purpose by this project."""


class InvalidInputError(TSPError, ValueError):
    """An argument has the wrong shape, type or range."""


class EmptyImageError(TSPError, ValueError):
    """An image without detections has no score (eq. 3 divides by zero) and no policy was given."""


class DatasetError(TSPError):
    """An annotation file or an image cannot be used for training or evaluation."""


class ImageFileError(DatasetError):
    """The file of an image is missing, damaged, or of another size than its annotations say; the others may be fine."""


class WeightsError(TSPError):
    """Pretrained weights are missing, damaged or of another network."""


class CheckpointError(TSPError):
    """A training checkpoint is damaged or belongs to another run."""


class DiskFullError(TSPError):
    """There was no space to write a file; what was there before is as it was. Worth trying again when there is some."""


class TooLargeError(TSPError):
    """Not even one image at a time fits into memory."""


class TrainingProcessError(TSPError):
    """One of several processes that train together has died again and again."""


class NonFiniteLossError(TSPError):
    """The training loss or the weights became NaN or infinite; the weights of that step were not kept."""


class RegistryError(TSPError):
    """A model version does not exist, exists already, or is damaged."""
