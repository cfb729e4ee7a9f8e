"""What is computed on one batch of rows. No Ray, no storage, no YAML: usable on a bare GPU machine."""
