"""The engine: one step of one optimizer, from hook to sinks."""
