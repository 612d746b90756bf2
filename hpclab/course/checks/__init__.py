"""What checks the exercises, one file a notebook."""
