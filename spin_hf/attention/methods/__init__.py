"""Which pages a query attends to: one method, one file."""
