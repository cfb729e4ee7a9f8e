"""The models that this project trains itself, so that a machine with no network has something to run."""
