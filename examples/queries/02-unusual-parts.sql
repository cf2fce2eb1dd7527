-- Which images have parts of unusual size? Far from their set's mean, in standard deviations of the set.
WITH sized AS (
    SELECT set_id, image_id, part_id, COUNT(*) AS patches
    FROM part_patches WHERE part_id >= 0
    GROUP BY set_id, image_id, part_id
), usual AS (
    SELECT set_id, part_id, AVG(patches) AS mean, STDDEV(patches) AS deviation
    FROM sized GROUP BY set_id, part_id
)
SELECT s.set_id, s.image_id, s.part_id, s.patches, (s.patches - u.mean) / u.deviation AS deviations
FROM sized AS s JOIN usual AS u ON s.set_id = u.set_id AND s.part_id = u.part_id
WHERE u.deviation > 0
ORDER BY ABS((s.patches - u.mean) / u.deviation) DESC, s.image_id, s.part_id
LIMIT 10
