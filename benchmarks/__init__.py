"""One file per question; results/ is an append-only ledger."""
