"""Input pipeline: reading and transforming images, sampling, collation and loading."""
