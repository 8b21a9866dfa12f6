"""Number formats: the arithmetic of packed weights in plain torch, readable as a specification."""
