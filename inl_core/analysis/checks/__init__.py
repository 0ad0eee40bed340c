"""Proofs that `inl check` gives on a user's own recipe or checkpoint; each says what it compared, and what differs."""
