"""The model in the reader's browser: its exporter, the runtime, and one kernel."""
