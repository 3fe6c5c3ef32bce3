"""What is rendered from records: tables, pages, figures, official files."""
