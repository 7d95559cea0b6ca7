"""The Transformers path as it serves: the library's modules on one packed row, with pages in place of its caches."""
