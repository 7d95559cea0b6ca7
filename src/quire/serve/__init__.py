"""The HTTP server: routes of the OpenAI API over an AsyncEngine. Knows requests and responses, not how tokens are made."""
