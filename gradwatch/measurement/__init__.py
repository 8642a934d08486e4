"""One step's tensors -> a snapshot."""
