"""What a person looks at: pictures, the report page, videos."""
