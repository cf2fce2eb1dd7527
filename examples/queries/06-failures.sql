-- What could not be extracted, and why?
SELECT stage, error, COUNT(*) AS images, MIN(image_id) AS for_example
FROM failures
GROUP BY stage, error
ORDER BY images DESC, stage, error
