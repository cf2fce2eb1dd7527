-- Which clusters are the most common ones of each label? The three largest shares.
WITH counted AS (
    SELECT i.label, a.cluster_id, COUNT(*) AS patches
    FROM assignments AS a JOIN images AS i ON a.image_id = i.image_id
    GROUP BY i.label, a.cluster_id
), ranked AS (
    SELECT label, cluster_id, patches,
           ROW_NUMBER() OVER (PARTITION BY label ORDER BY patches DESC, cluster_id) AS place
    FROM counted
)
SELECT label, place, cluster_id, patches FROM ranked WHERE place <= 3 ORDER BY label, place
