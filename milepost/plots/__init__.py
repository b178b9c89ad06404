"""The curves of runs: read from their metrics, drawn on a terminal or into a picture."""
