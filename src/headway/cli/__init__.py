"""The command: one module per verb, imported only when it is called."""
