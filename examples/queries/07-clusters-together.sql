-- Which clusters occur in the same images? Pairs, by the number of images with both.
WITH present AS (
    SELECT DISTINCT image_id, cluster_id FROM assignments
)
SELECT a.cluster_id, b.cluster_id AS other, COUNT(*) AS images
FROM present AS a JOIN present AS b ON a.image_id = b.image_id
WHERE a.cluster_id < b.cluster_id
GROUP BY a.cluster_id, b.cluster_id
ORDER BY images DESC, a.cluster_id, other
LIMIT 10
