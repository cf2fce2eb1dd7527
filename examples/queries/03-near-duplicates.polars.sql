-- Which images are nearly the same? Cosine of their embeddings. (Millions of images: `dinoray index`, then `search`.)
-- Polars has no product of lists in SQL: one row for each number, multiplied and added.
WITH numbers AS (
    SELECT image_id, place, CAST(number AS DOUBLE) AS number FROM embedding_numbers
), lengths AS (
    SELECT image_id, SQRT(SUM(number * number)) AS length FROM numbers GROUP BY image_id
), products AS (
    SELECT a.image_id AS image_id, b.image_id AS other, SUM(a.number * b.number) AS product
    FROM numbers AS a JOIN numbers AS b ON a.place = b.place
    WHERE a.image_id < b.image_id
    GROUP BY a.image_id, b.image_id
)
SELECT p.image_id, p.other, p.product / (m.length * n.length) AS similarity
FROM products AS p JOIN lengths AS m ON p.image_id = m.image_id JOIN lengths AS n ON p.other = n.image_id
ORDER BY similarity DESC, p.image_id, p.other
LIMIT 10
