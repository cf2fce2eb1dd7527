-- Where in the photos is the largest cluster? Its extent in each image, in pixels of the original (patch centres).
WITH largest AS (
    SELECT cluster_id FROM assignments GROUP BY cluster_id ORDER BY COUNT(*) DESC, cluster_id LIMIT 1
)
SELECT a.image_id, COUNT(*) AS patches, MIN(p.x) AS x0, MIN(p.y) AS y0, MAX(p.x) AS x1, MAX(p.y) AS y1
FROM assignments AS a
JOIN largest AS l ON a.cluster_id = l.cluster_id
JOIN patches AS p ON a.image_id = p.image_id AND a.row = p.row AND a.col = p.col
GROUP BY a.image_id
ORDER BY patches DESC, a.image_id
LIMIT 10
