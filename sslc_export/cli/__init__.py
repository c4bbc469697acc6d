"""The commands, one short file each: arguments in, library calls, exit code out."""
