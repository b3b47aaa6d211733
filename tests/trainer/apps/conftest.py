from grounded import certain, grounder, images, pair  # noqa: F401 - fixtures
