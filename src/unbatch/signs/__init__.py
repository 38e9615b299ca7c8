"""Signs that a server planted its model, one per file; found, never listed."""

from unbatch.plugin import by_class_name

__getattr__, __dir__ = by_class_name(__name__)
