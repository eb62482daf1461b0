"""What is wrong with a data set, what is doubtful, and whether a run would start on it."""
