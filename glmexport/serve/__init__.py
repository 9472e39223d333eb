"""HTTP over bundles: the APIs of Ollama and OpenAI, several answers computed at once."""
