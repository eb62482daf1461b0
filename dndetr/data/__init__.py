"""From files, or from nothing, to batches: formats, checks, transforms, loaders, classes."""
