-- Which images are nearly the same? Cosine of their embeddings. (Millions of images: `dinoray index`, then `search`.)
WITH vectors AS (
    SELECT image_id, transform(embedding, v -> double(v)) AS v FROM images
), unit AS (
    SELECT image_id, v, sqrt(aggregate(v, 0D, (s, x) -> s + x * x)) AS length FROM vectors
)
SELECT a.image_id, b.image_id AS other,
       aggregate(zip_with(a.v, b.v, (x, y) -> x * y), 0D, (s, x) -> s + x) / (a.length * b.length) AS similarity
FROM unit AS a JOIN unit AS b ON a.image_id < b.image_id
ORDER BY similarity DESC, a.image_id, b.image_id
LIMIT 10
