"""One cell from its clients to its rows, and the runs of many."""
