"""One module per format in which data sets lie on the disk; all of them yield the same records."""
