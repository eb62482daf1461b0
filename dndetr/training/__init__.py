"""One step of training, and the loop around it: no file format, no picture and no terminal is known here."""
