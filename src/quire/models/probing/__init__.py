"""Before a model is served: which way of serving it is proved to give the library's answers, with which replacements."""
