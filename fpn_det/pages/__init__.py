"""Self-contained HTML pages: the document with its style, tables and pictures, and charts."""
