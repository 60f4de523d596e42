"""The implementations, each answering to `contract.Backend`; `dispatch` chooses."""
