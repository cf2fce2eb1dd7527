-- Which images are unlike all clusters? The largest mean distance of their patches to their centroids.
SELECT a.image_id, i.label, AVG(a.distance) AS distance
FROM assignments AS a JOIN images AS i ON a.image_id = i.image_id
GROUP BY a.image_id, i.label
ORDER BY distance DESC, a.image_id
LIMIT 10
