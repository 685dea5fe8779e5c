"""The HTTP server: OpenAI's protocol, its limits, and a chat page."""
