-- How has the store grown? Images of each run that are still current, and all up to it.
WITH runs AS (
    SELECT run_id, COUNT(*) AS images FROM images GROUP BY run_id
)
SELECT run_id, images, SUM(images) OVER (ORDER BY run_id) AS images_so_far
FROM runs
ORDER BY run_id
