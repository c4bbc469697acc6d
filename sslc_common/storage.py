"""What the storage format fixes for everyone who reads or writes it (docs/format.md)."""

SCALE_GROUP = 64  # columns of a row that share one scale of int8 values: one word of the bitmap
