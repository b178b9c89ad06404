"""The page that shows runs in a browser: served while they train, or written as one file."""
