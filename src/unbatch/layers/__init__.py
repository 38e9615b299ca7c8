"""Layer rules, one kind of layer per file; found, never listed."""

from unbatch.plugin import by_class_name

__getattr__, __dir__ = by_class_name(__name__)
