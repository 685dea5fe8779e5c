"""The server: OpenAI's protocol over HTTP, limits, and a page to chat on.

Knows requests, pictures in them, keys, queues and logs. Does not know how an answer is made: that is the
engine's work, or that of an upstream server.
"""
