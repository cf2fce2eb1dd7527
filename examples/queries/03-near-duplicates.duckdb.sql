-- Which images are nearly the same? Cosine of their embeddings. (Millions of images: `dinoray index`, then `search`.)
SELECT a.image_id, b.image_id AS other, list_cosine_similarity(a.embedding, b.embedding) AS similarity
FROM images AS a JOIN images AS b ON a.image_id < b.image_id
ORDER BY similarity DESC, a.image_id, b.image_id
LIMIT 10
