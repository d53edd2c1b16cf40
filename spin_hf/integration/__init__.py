"""Everything that patches transformers or reads its internals."""
