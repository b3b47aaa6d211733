from chain_runs import key, options, server  # noqa: F401 - fixtures
