-- How much of the images is foreground, by label?
SELECT i.label, COUNT(*) AS images, AVG(p.foreground_fraction) AS foreground
FROM parts AS p JOIN images AS i ON p.image_id = i.image_id
GROUP BY i.label
ORDER BY foreground DESC, i.label
